-- The checkpoint database. Times are ISO-8601 text in UTC, durations nanoseconds, sizes bytes.
--
-- WITHOUT ROWID only where the key's columns come first: integrity_check of SQLite 3.40 reports
-- NULLs that are not there in such tables with other columns before them.

CREATE TABLE pipeline_runs (            -- one row per pipeline configuration
    run_id        INTEGER PRIMARY KEY AUTOINCREMENT,
    config_hash   TEXT    NOT NULL UNIQUE,  -- SHA-256 of config_json
    config_json   TEXT    NOT NULL,
    started_at    TEXT    NOT NULL,
    run_dir       TEXT    NOT NULL,         -- working directory of the first run
    total_indices INTEGER NOT NULL,         -- length of the source when last run
    psnc_version  TEXT    NOT NULL,
    claims        TEXT,                     -- JSON array of the drivers at work, or NULL
    code_versions TEXT                      -- JSON object of what the stages' code was, or NULL
);

CREATE TABLE index_results (            -- one row per index that ended
    idx               INTEGER NOT NULL,
    run_id            INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    status            TEXT    NOT NULL CHECK (status IN ('completed', 'error')),
    output_paths      TEXT    NOT NULL,     -- JSON array
    completed_at      TEXT    NOT NULL,
    wall_time_ns      INTEGER NOT NULL,
    peak_memory_bytes INTEGER,
    gpu_memory_bytes  INTEGER,              -- NULL without a GPU
    error             TEXT,                 -- NULL for success
    worker_id         TEXT,                 -- NULL if the worker died
    measurements      TEXT,                 -- JSON object of plugins' own figures, or NULL
    checksum          INTEGER,              -- CRC-32 of the result, see checksums.py
    details_checksum  INTEGER,              -- CRC-32 of all else that is recorded of the index
    attempts          INTEGER,              -- how often it was tried until now
    code_digest       TEXT,                 -- what the stages' code was: a key of code_versions
    PRIMARY KEY (run_id, idx)
) WITHOUT ROWID;

CREATE TABLE stage_metrics (
    idx          INTEGER NOT NULL,
    run_id       INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    stage_order  INTEGER NOT NULL,          -- 0 source, 1..N filters, N+1 sink
    stage_name   TEXT    NOT NULL,
    wall_time_ns INTEGER NOT NULL,          -- the stage's own, without the stages before it
    PRIMARY KEY (run_id, idx, stage_order)
) WITHOUT ROWID;

CREATE TABLE workers (                  -- one row per thread that ran indices
    worker_id       TEXT    PRIMARY KEY,    -- UUID4, hexadecimal
    run_id          INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    pid             INTEGER NOT NULL,
    hostname        TEXT    NOT NULL,
    started_at      TEXT    NOT NULL,
    last_heartbeat  TEXT    NOT NULL,
    current_index   INTEGER,                -- NULL when idle
    completed_count INTEGER NOT NULL,
    invocation_id   TEXT    NOT NULL        -- shared by the workers of one run_pipeline call
);

CREATE TABLE output_files (             -- from an output path back to its index
    path           TEXT    NOT NULL,
    idx            INTEGER NOT NULL,
    run_id         INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    seq            INTEGER NOT NULL,        -- place in the sink's list
    size_bytes     INTEGER,                 -- as the index ended, or NULL
    content_digest TEXT,                    -- SHA-256 of the content then, or NULL
    PRIMARY KEY (run_id, idx, seq)
);
CREATE INDEX output_files_by_path ON output_files (path, run_id, idx);

CREATE TABLE filter_artifacts (
    path         TEXT    NOT NULL,
    idx          INTEGER NOT NULL,
    run_id       INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    filter_name  TEXT    NOT NULL,
    filter_order INTEGER NOT NULL,          -- the filter's place in the pipeline, from 1
    PRIMARY KEY (run_id, idx, filter_order, path)
);

CREATE TABLE logs (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id      INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
    timestamp   TEXT    NOT NULL,
    level       INTEGER NOT NULL,
    level_name  TEXT    NOT NULL,
    logger_name TEXT    NOT NULL,
    message     TEXT    NOT NULL,
    worker_id   TEXT,
    idx         INTEGER
);
CREATE INDEX logs_by_index ON logs (run_id, idx);
