"""Named in the tests' configs under `imports`: the zoo gets `SMALL_PALE` as `two_blocks`."""

from functools import partial

from ppvision.models.pale_transformer import PaleTransformer
from ppvision.zoo import register_model
from ppvision.zoo.registry import ModelCard
from tests.helpers.small_pale import SMALL_PALE

register_model(ModelCard("two_blocks", paper="none", parameters=0, gflops=0.0, recipe="none"))(
    partial(PaleTransformer, SMALL_PALE)
)
