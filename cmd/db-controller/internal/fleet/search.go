package fleet

import (
	"bytes"
	"fmt"
)

// search returns the connection string of the search store, nothing if there is none.
func (m *member) search() ([]byte, error) {
	ref := m.spec.Search
	if ref.Name == "" {
		return nil, nil
	}
	secret, err := m.fleet.cfg.Secrets.Get(m.ctx, ref.Namespace, ref.Name)
	if err != nil {
		return nil, fmt.Errorf("spec.search.secretRef: %w", err)
	}
	if len(secret[ref.Key]) == 0 {
		return nil, fmt.Errorf("spec.search.secretRef: secret %s has no key %q", ref.Name, ref.Key)
	}
	return bytes.TrimSpace(secret[ref.Key]), nil
}
