"""What every script needs, and the paper does not teach."""
