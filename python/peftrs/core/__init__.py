"""The machinery that every method shares: the contract, the adapted layer and its fold, injection, merging,
management.
"""
