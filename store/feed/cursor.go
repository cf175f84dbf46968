package feed

import (
	"encoding/base64"
	"errors"
	"strconv"
	"strings"

	"github.com/dbcontroller/db-controller/store"
)

// Cursor is a position in one Deployment's change feed. The zero Cursor is none.
type Cursor struct {
	// Epoch is the feed epoch in which the ids of Snapshot have a meaning.
	Epoch    int64
	Snapshot Snapshot
}

// ErrCursorLost means that the feed can no longer say what changed since a cursor: its epoch has ended (failover, restore), or
// tombstones that it had not seen may have been purged. The consumer must compare, or start from a snapshot.
var ErrCursorLost = errors.New("the cursor's history is gone")

// tokenVersion is the first field of a token; a reader refuses what it does not know.
const tokenVersion = "1"

// IsZero says whether c is no position at all.
func (c Cursor) IsZero() bool { return c.Snapshot.Xmax == 0 }

// Token returns c in the opaque form that travels; the zero Cursor is "".
func (c Cursor) Token() string {
	if c.IsZero() {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString([]byte(tokenVersion + "|" + strconv.FormatInt(c.Epoch, 10) + "|" + c.Snapshot.String()))
}

// ParseToken reads what Token wrote. The error is an InvalidArgument about the field cursor.
func ParseToken(token string) (Cursor, error) {
	if token == "" {
		return Cursor{}, nil
	}
	bad := store.Invalid("cursor", "is not a token of this feed: send back one that was received, or none")
	text, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return Cursor{}, bad
	}
	parts := strings.SplitN(string(text), "|", 3)
	if len(parts) != 3 || parts[0] != tokenVersion {
		return Cursor{}, bad
	}
	epoch, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil || epoch < 1 {
		return Cursor{}, bad
	}
	snapshot, err := ParseSnapshot(parts[2])
	if err != nil {
		return Cursor{}, bad
	}
	return Cursor{epoch, snapshot}, nil
}
