"""Transactions on a database in WAL mode.

run FILE TOTAL: inserts rows up to TOTAL, one durable transaction each, and
prints "ack N" after it. check FILE: prints "rows N" when the database is whole
and holds the rows 0 to N-1.
"""
import hashlib
import sqlite3
import sys


def open_db(path):
    db = sqlite3.connect(path, isolation_level=None, timeout=60)
    mode = db.execute("pragma journal_mode=wal").fetchone()[0]
    if mode != "wal":
        sys.exit(f"journal mode is {mode}")
    db.execute("pragma synchronous=full")
    db.execute("create table if not exists t (n integer primary key, body text)")
    return db


def body(n):
    return hashlib.sha256(str(n).encode()).hexdigest() * (1 + n % 20)


def run(path, total):
    db = open_db(path)
    first = db.execute("select count(*) from t").fetchone()[0]
    for n in range(first, total):
        db.execute("begin immediate")
        db.execute("insert into t values (?, ?)", (n, body(n)))
        db.execute("commit")
        print("ack", n + 1, flush=True)


def check(path):
    db = open_db(path)
    found = db.execute("pragma integrity_check").fetchone()[0]
    if found != "ok":
        sys.exit(f"integrity_check: {found}")
    rows = db.execute("select n, body from t order by n").fetchall()
    for i, (n, text) in enumerate(rows):
        if n != i or text != body(i):
            sys.exit(f"row {i} is {n}, {text[:20]}")
    print("rows", len(rows))


if sys.argv[1] == "run":
    run(sys.argv[2], int(sys.argv[3]))
else:
    check(sys.argv[2])
