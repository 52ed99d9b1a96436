"""How features travel from a server to a client."""
