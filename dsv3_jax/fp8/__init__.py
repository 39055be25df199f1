"""FP8 training [§3.3]: formats, quantisers, products with the tensor core's accumulation, the table of what runs in what."""
