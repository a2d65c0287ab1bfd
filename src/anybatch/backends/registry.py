"""The backends, in the order in which they are asked."""

from anybatch.backends.aten.backend import AtenBackend
from anybatch.backends.numba.backend import NumbaBackend
from anybatch.backends.protocol import Backend
from anybatch.backends.torch_library import TorchLibraryBackend
from anybatch.backends.triton.backend import TritonBackend

ATEN = AtenBackend()  # serves every batch
BACKENDS: tuple[Backend, ...] = (TritonBackend(), NumbaBackend(), TorchLibraryBackend(), ATEN)
