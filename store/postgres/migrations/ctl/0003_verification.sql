-- Verification of copies by content.

-- Up to which of the owner's times the copies of a type were verified without a gap, and what the last pass found.
CREATE TABLE verified (
    version          text NOT NULL,
    service          text NOT NULL,
    peer             text NOT NULL,
    type             text NOT NULL,
    verified_through timestamptz,       -- the beginning of the last pass that found nothing; NULL: there was none yet
    finished_at      timestamptz NOT NULL,
    compared         bigint NOT NULL,
    differences      bigint NOT NULL,
    PRIMARY KEY (version, service, peer, type)
);

-- The pass that goes on in the background, so that it is resumed, and who runs it.
CREATE TABLE verification (
    version       text NOT NULL,
    service       text NOT NULL,
    peer          text NOT NULL,
    state         text NOT NULL DEFAULT '',   -- where the pass stands; empty between two passes
    next_at       timestamptz NOT NULL DEFAULT now(),
    holder        text NOT NULL,
    held_until    timestamptz NOT NULL,
    PRIMARY KEY (version, service, peer)
);
