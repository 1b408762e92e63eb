"""User errors, atomic files and process groups. All folders may import this package. It imports none of them."""
