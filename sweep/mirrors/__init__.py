"""Copies of the ledger for other tools: MLflow.

A mirror can be deleted and rebuilt; nothing reads results from it.
"""
