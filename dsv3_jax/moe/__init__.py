"""DeepSeekMoE [§2.1.2]: route, dispatch, experts, combine; and the controllers that balance the load."""
