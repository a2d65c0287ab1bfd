"""What processes of a training begin with: every module imported, every kernel loaded."""

import warnings

import torch

from reliability.course import Course, Training

torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _method in ("cbn", "mabn", "fs+vdn"):
        for _precision in ("float32", "float16"):
            _training = Training(Course(_method, _precision), 0, 0)
            _training.forward_and_backward(_training.model, 0)
