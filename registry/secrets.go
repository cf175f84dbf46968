package registry

import (
	"context"
	"errors"
)

// ErrSecretNotFound says that there is no secret of that name.
var ErrSecretNotFound = errors.New("secret not found")

// Secrets reads secrets by name, always afresh. Implementations never cache over a change, never log what they read, and may be
// called from any goroutine.
type Secrets interface {
	// Get returns the entries of a secret. It fails with ErrSecretNotFound when there is none; any other error is worth a retry.
	Get(ctx context.Context, namespace, name string) (map[string][]byte, error)
}
