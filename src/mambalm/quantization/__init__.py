"""Projections whose weights are kept in few bits, and products of a matrix and a vector at the speed of memory."""
