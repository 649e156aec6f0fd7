-- The checkpoint tables, the same as in psnc's SQLite databases, with PostgreSQL's types, and two
-- besides: what a file's name and header say of a SQLite database is said by rows here.
--
-- Times are ISO-8601 text in UTC, durations nanoseconds, sizes bytes. "{schema}" is the schema that
-- the store's URL names. Text that is sorted by is in the order of its bytes on every server.

CREATE TABLE {schema}.psnc_schema (
    version    INTEGER NOT NULL,
    written_by TEXT   NOT NULL         -- the distribution that made these tables
);

CREATE TABLE {schema}.pipeline_runs (
    run_id        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    config_hash   TEXT   NOT NULL,      -- SHA-256 of config_json
    config_json   TEXT   NOT NULL,
    started_at    TEXT   NOT NULL,
    run_dir       TEXT   NOT NULL,      -- working directory of the process that began it
    total_indices BIGINT NOT NULL,      -- length of the source when last run
    psnc_version  TEXT   NOT NULL,
    claims        TEXT,                 -- JSON array of the drivers at work, or NULL
    code_versions TEXT                  -- JSON object of what the stages' code was, or NULL
);
CREATE INDEX pipeline_runs_by_hash ON {schema}.pipeline_runs (config_hash, run_id);

CREATE TABLE {schema}.pipeline_instances (  -- which run a pipeline object and its copies record to
    instance_id TEXT   PRIMARY KEY,
    run_id      BIGINT NOT NULL REFERENCES {schema}.pipeline_runs
);

CREATE TABLE {schema}.index_results (
    idx               BIGINT NOT NULL,
    run_id            BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    status            TEXT   NOT NULL CHECK (status IN ('completed', 'error')),
    output_paths      TEXT   NOT NULL,  -- JSON array
    completed_at      TEXT   NOT NULL,
    wall_time_ns      BIGINT NOT NULL,
    peak_memory_bytes BIGINT,
    gpu_memory_bytes  BIGINT,           -- NULL without a GPU
    error             TEXT,             -- NULL for success
    worker_id         TEXT,             -- NULL if the worker died
    measurements      TEXT,             -- JSON object of plugins' own figures, or NULL
    attempts          BIGINT,           -- how often it was tried until now
    code_digest       TEXT,             -- what the stages' code was: a key of code_versions
    PRIMARY KEY (run_id, idx)
);

CREATE TABLE {schema}.stage_metrics (
    idx          BIGINT NOT NULL,
    run_id       BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    stage_order  BIGINT NOT NULL,      -- 0 source, 1..N filters, N+1 sink
    stage_name   TEXT   NOT NULL,
    wall_time_ns BIGINT NOT NULL,      -- the stage's own, without the stages before it
    PRIMARY KEY (run_id, idx, stage_order)
);

CREATE TABLE {schema}.workers (
    worker_id       TEXT   PRIMARY KEY, -- UUID4, hexadecimal
    run_id          BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    pid             BIGINT NOT NULL,
    hostname        TEXT   NOT NULL,
    started_at      TEXT   NOT NULL COLLATE "C",
    last_heartbeat  TEXT   NOT NULL COLLATE "C",
    current_index   BIGINT,             -- NULL when idle
    completed_count BIGINT NOT NULL,
    invocation_id   TEXT   NOT NULL     -- shared by the workers of one run_pipeline call
);
CREATE INDEX workers_by_run ON {schema}.workers (run_id);
CREATE INDEX workers_by_invocation ON {schema}.workers (invocation_id);

CREATE TABLE {schema}.output_files (
    path           TEXT   NOT NULL,
    idx            BIGINT NOT NULL,
    run_id         BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    seq            BIGINT NOT NULL,    -- place in the sink's list
    size_bytes     BIGINT,             -- as the index ended, or NULL
    content_digest TEXT,               -- SHA-256 of the content then, or NULL
    PRIMARY KEY (run_id, idx, seq)
);
-- By hash, since a path may be longer than what another kind of index takes.
CREATE INDEX output_files_by_path ON {schema}.output_files USING hash (path);

CREATE TABLE {schema}.filter_artifacts (
    path         TEXT   NOT NULL COLLATE "C",
    idx          BIGINT NOT NULL,
    run_id       BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    filter_name  TEXT   NOT NULL,
    filter_order BIGINT NOT NULL       -- the filter's place in the pipeline, from 1
);
CREATE INDEX filter_artifacts_by_index ON {schema}.filter_artifacts (run_id, idx);

CREATE TABLE {schema}.logs (
    id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id      BIGINT NOT NULL REFERENCES {schema}.pipeline_runs,
    timestamp   TEXT   NOT NULL,
    level       BIGINT NOT NULL,
    level_name  TEXT   NOT NULL,
    logger_name TEXT   NOT NULL,
    message     TEXT   NOT NULL,
    worker_id   TEXT,
    idx         BIGINT
);
CREATE INDEX logs_by_index ON {schema}.logs (run_id, idx);
