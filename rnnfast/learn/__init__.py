"""What a person needs around a recurrent layer: text, batches, layers, optimisers, a trainer.

Knows the public modules of rnnfast and NumPy. Leaves showing anything on a terminal to `cli`.
"""

from .batches import Batch, RandomBatches, SequentialBatches
from .corpus import Corpus, DataError, standard_library, text_file
from .language_model import LanguageModel
from .layers import IGNORED, Embedding, Linear, OneHot, cross_entropy, perplexity
from .optimizers import SGD, Adam, clip_gradients, warm_up_and_cosine
from .targets import target_loss
from .tbptt import Truncated, tbptt
from .threads import one_blas_thread
from .trainer import Settings, Trainer, read_settings
from .vocabulary import UNKNOWN, Vocabulary

__all__ = [
    "IGNORED",
    "SGD",
    "UNKNOWN",
    "Adam",
    "Batch",
    "Corpus",
    "DataError",
    "Embedding",
    "LanguageModel",
    "Linear",
    "OneHot",
    "RandomBatches",
    "SequentialBatches",
    "Settings",
    "Trainer",
    "Truncated",
    "Vocabulary",
    "clip_gradients",
    "cross_entropy",
    "one_blas_thread",
    "perplexity",
    "read_settings",
    "standard_library",
    "target_loss",
    "tbptt",
    "text_file",
    "warm_up_and_cosine",
]
