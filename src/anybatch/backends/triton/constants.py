"""Where programs take moments and sums from, and what they are not compiled for."""

TILE, TILES, PARTS = 0, 1, 2  # a tile in registers; several; parts that others left

# What changes from layer to layer, and is no reason to compile again.
LOOSE = [
    "inner",
    "outer",
    "start",
    "small",
    "large",
    "groups",
    "group",
    "all_groups",
    "tiles",
    "held",
    "parts",
    "length0",
    "length1",
    "weighing",
    "total",
]
