"""The site-loss drill: a whole site dies under load, stays away, and comes back."""
