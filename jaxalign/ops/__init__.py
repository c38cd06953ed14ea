"""Arrays to arrays, one function one equation. No model, no parameters, no config."""
