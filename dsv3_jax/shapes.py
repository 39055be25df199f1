"""The alphabet of dimensions: one capital letter an axis, in array annotations and in the suffixes of variables.

`c_kv_BTC` is [batch, sequence, latent channels]; `Float[Array, "B T D"]` says the same of an argument.
"""

AXES = {
    "A": "micro-batches of an optimiser step",
    "B": "sequences of a batch",
    "C": "channels: of a latent, or of a head's content part; positions of a chunk in the loss",
    "D": "hidden_size",
    "E": "n_routed_experts",
    "F": "moe_intermediate_size, the width of one expert",
    "G": "key/value heads; groups of experts in the router",
    "H": "num_attention_heads",
    "I": "input channels of a linear operation",
    "J": "pairs of rotary channels, qk_rope_head_dim / 2",
    "K": "num_experts_per_tok; in attention, all query/key channels of a head",
    "L": "layers with a router: the main model's, then those of the MTP modules",
    "M": "domains of the data; any other outer number of rows",
    "N": "tokens of a batch, flattened",
    "O": "output channels of a linear operation",
    "P": "ranks of the expert axis, that receive rows",
    "Q": "depths of prediction, the main model's first; query heads that share a key/value head",
    "R": "rotary channels of a head; rows (token, chosen expert) of the experts",
    "S": "tokens of a window: the inputs and the last target, T + 1; ranks of the expert axis, that send rows",
    "T": "sequence",
    "V": "vocab_size",
    "W": "v_head_dim",
    "X": "rows of the experts, each expert's beginning a new block; bytes of a packed row",
}
