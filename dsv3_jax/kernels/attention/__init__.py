"""MLA's attention in training and prefill, eqs. 10-11 [§2.1.1]: flash style, content and rotary parts apart."""
