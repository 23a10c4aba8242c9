"""Training: recipes, the objective, one step, the loop."""
