"""What happens to a rewritten graph before its target's compiler sees it: kernels are chosen, and put together."""
