"""The checkpoint store of psnc on PostgreSQL.

A pipeline names it by URL: ``Pipeline(…, store="postgresql://user@host/database")``.
"""
