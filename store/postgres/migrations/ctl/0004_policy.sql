-- How far each policy is carried out for the resources that are owned here. holder is empty for the policy of the service.
CREATE TABLE policy_progress (
    version   text NOT NULL,
    holder    text COLLATE "C" NOT NULL,
    says      text NOT NULL,              -- digest of what the policy decides about resources owned here
    after     text COLLATE "C" NOT NULL DEFAULT '', -- names up to this one are done in this round
    round     int NOT NULL DEFAULT 1,
    done      boolean NOT NULL DEFAULT false,
    total     bigint NOT NULL DEFAULT 0,
    checked   bigint NOT NULL DEFAULT 0,
    changed   bigint NOT NULL DEFAULT 0,
    misplaced bigint NOT NULL DEFAULT 0,
    started   timestamptz NOT NULL DEFAULT now(),
    updated   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (version, holder)
);
CREATE INDEX policy_progress_due ON policy_progress (version, holder) WHERE NOT done;

-- Rates that were measured here, for estimates: 'policy' is rows whose regions were changed, 'copy <region>' rows of that region merged here.
CREATE TABLE measured_rate (
    what            text PRIMARY KEY,
    rows_per_second double precision NOT NULL,
    measured_at     timestamptz NOT NULL DEFAULT now()
);
