"""What a step costs, by arithmetic: data sheets, estimates, candidates, the tuned table, and the choice."""
