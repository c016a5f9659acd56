"""From fingerprints to candidates: remembers many models and finds near ones.

This package opens no weights. It imports nothing from `lineage`.
"""
