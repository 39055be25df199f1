"""Serving [§3.4; section 2.3.2 of the ISCA'25 paper]: the bound that the exchange sets to decoding, and dollars."""

from typing import NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.planner.rows import Number

FP8, BF16 = 1, 2  # bytes of a dispatched and of a combined channel
MICRO_BATCHES = 2  # one computes while the other's rows travel, so a layer takes two exchanges


class Decode(NamedTuple):
    """One token for each of a device's sequences."""

    exchange: float  # seconds of one layer's dispatch and combine
    seconds: float

    @property
    def tokens_per_second(self) -> Number:
        """Of one sequence."""
        return 1 / self.seconds


def decode_bound(tokens: int, experts: int, hidden: int, layers: int, bytes_per_second: Number) -> Decode:
    """If the exchange of `tokens` tokens a device, each to `experts` of them, were all that takes time."""
    exchange = (FP8 + BF16) * tokens * experts * hidden / bytes_per_second
    return Decode(exchange, exchange * MICRO_BATCHES * layers)


def experts_reached(model: ModelConfig) -> int:
    """Transfers that a token pays for: its routed experts, and the shared ones served as if one more were routed."""
    return model.num_experts_per_tok + (model.n_shared_experts > 0)


def dollars_per_million(tokens_per_second: Number, dollars_per_hour: Number) -> Number:
    """Of served tokens, at one device's rate and price."""
    return dollars_per_hour / 3600 / tokens_per_second * 1e6
