"""Looking at a network with data: what its normalization does to it.

`diagnose` measures the noise of each norm's statistics and reads it.
"""

from anybatch.evaluation.diagnose import Diagnosis as Diagnosis
from anybatch.evaluation.diagnose import diagnose as diagnose
