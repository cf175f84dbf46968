-- The policy of the service that this region follows: what a ServiceDescriptor says comes into force only when it leaves nothing behind that nobody may own.
CREATE TABLE service_policy (
    one      boolean PRIMARY KEY DEFAULT true CHECK (one),
    policy   text NOT NULL,          -- a MultiRegionPolicy in JSON, as this program writes it; empty for none
    taken_at timestamptz NOT NULL DEFAULT now()
);
SELECT fence('service_policy');
