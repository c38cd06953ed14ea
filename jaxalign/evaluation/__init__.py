"""How good an answer is, by the rules that others published, so that figures compare."""
