"""Which openings of a question separate refusals from answers in a training corpus, before a model learns them.

Every question–answer pair of the corpus counts once. A *cue* is a property of the question (its first word, its length)
that may predict whether it is refused; for each of its values the corpus shows how often it goes with a refusal.
docs/audit_method.md explains each figure.
"""

from mirage_dist.data.audit.corpus import Corpus, Options
from mirage_dist.data.audit.files import Audit, audit
from mirage_dist.data.audit.verdict import Imitated, warning

__all__ = ["Audit", "Corpus", "Imitated", "Options", "audit", "warning"]
