"""How long it takes and what to choose: estimates, memory, steps, planners."""
