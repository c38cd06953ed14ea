"""Where preferences come from, when no person gives them."""
