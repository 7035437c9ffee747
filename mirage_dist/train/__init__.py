"""Training on DeepSpeed's engine: the step, its data, checkpoints, and the records of a run.

Called, it is `mirage_dist.api.train`.
"""

import sys

from mirage_dist import Verb
from mirage_dist.ranks import name_accelerator

name_accelerator()
sys.modules[__name__].__class__ = Verb
