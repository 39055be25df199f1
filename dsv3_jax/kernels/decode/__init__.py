"""Absorbed MLA over one latent cache [§2.1.1, §3.4]: paged or contiguous, split over the sequence."""
