"""Training: the loop, scenes, degradations and the stages of the product's own networks."""
