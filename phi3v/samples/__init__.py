"""Sample products, a tiny model, and the demo that is made of them."""
