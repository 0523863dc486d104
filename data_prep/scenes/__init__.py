"""Painters of the embedded sample corpora: a module a domain, each a pure function of a random generator."""
