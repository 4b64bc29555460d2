"""TSR and ARR: bounded edits by projected gradient, towards safe answers and away from harmful ones."""
