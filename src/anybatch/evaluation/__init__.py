"""Looking at a network with data: what its normalization does to it.

`diagnose` measures the noise of each norm's statistics and reads it; `dataset_statistics` gives
mean and spread of a dataset's channels.
"""

from anybatch.evaluation.dataset import DatasetStatistics as DatasetStatistics
from anybatch.evaluation.dataset import dataset_statistics as dataset_statistics
from anybatch.evaluation.diagnose import Diagnosis as Diagnosis
from anybatch.evaluation.diagnose import diagnose as diagnose
