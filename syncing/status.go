package syncing

import (
	"encoding/json"
	"time"
)

// State is what the copying from a peer, or of one subrange, is at.
type State string

// The states, from the best to the worst; a pair is in the worst state of its subranges.
const (
	// Live: changes are applied as they come.
	Live State = "Live"
	// CatchingUp: the cursor was valid, and a backlog is being applied.
	CatchingUp State = "CatchingUp"
	// Comparing: there was no valid cursor; changes are applied, and the rest is compared or copied.
	Comparing State = "Comparing"
	// Connecting: the peer has not sent anything yet.
	Connecting State = "Connecting"
	// Disconnected: the last attempt has failed; the next one follows within seconds.
	Disconnected State = "Disconnected"
	// Suspended: copying is suspended by the operator; only the contact is kept.
	Suspended State = "Suspended"
)

var badness = map[State]int{Live: 0, CatchingUp: 1, Comparing: 2, Connecting: 3, Disconnected: 4, Suspended: 5}

// Worse returns the worse of s and o.
func (s State) Worse(o State) State {
	if badness[o] > badness[s] {
		return o
	}
	return s
}

// PeerStatus says how well this region follows another one. A nil duration is not known yet, and must be taken for bad.
type PeerStatus struct {
	Service, Region string
	State           State
	// ContactAge is the time since the peer last answered.
	ContactAge *time.Duration
	// Freshness is the age of the peer's state that is completely applied here.
	Freshness *time.Duration
	// ApplyLag is the age of the oldest change that is known here and not applied; 0 without one.
	ApplyLag *time.Duration
	// PendingRows are rows received and not applied, and names known to differ.
	PendingRows int64
	// RowsApplied since this process follows the peer.
	RowsApplied int64
	// Quarantined rows of the peer could not be applied.
	Quarantined int64
	// Progress of the initial copy or comparison, 0 to 1.
	Progress float64
	// Remaining is how long it still takes, at the speed so far; 0 when it is done.
	Remaining *time.Duration
	// ClockOffset is the peer's clock minus ours.
	ClockOffset *time.Duration
	Suspended   bool
	// Throttled says why an initial copy or a comparison is held back; empty while none is.
	Throttled Throttle
	// LastError and its time; empty when nothing has failed since the peer is Live.
	LastError     string
	LastErrorTime time.Time
}

// peerStatusJSON is a PeerStatus as people and other processes see it: durations in seconds, what is unknown null.
type peerStatusJSON struct {
	Service       string     `json:"service"`
	Region        string     `json:"region"`
	State         State      `json:"state"`
	ContactAge    *float64   `json:"contactAgeSeconds"`
	Freshness     *float64   `json:"freshnessSeconds"`
	ApplyLag      *float64   `json:"applyLagSeconds"`
	PendingRows   int64      `json:"pendingRows"`
	RowsApplied   int64      `json:"rowsApplied"`
	Quarantined   int64      `json:"quarantined"`
	Progress      float64    `json:"progress"`
	Remaining     *float64   `json:"remainingSeconds,omitempty"`
	ClockOffset   *float64   `json:"clockOffsetSeconds"`
	Suspended     bool       `json:"suspended"`
	Throttled     Throttle   `json:"throttled,omitempty"`
	LastError     string     `json:"lastError,omitempty"`
	LastErrorTime *time.Time `json:"lastErrorTime,omitempty"`
}

// MarshalJSON shows durations in seconds; what is unknown is null.
func (s PeerStatus) MarshalJSON() ([]byte, error) {
	var failedAt *time.Time
	if !s.LastErrorTime.IsZero() {
		failedAt = &s.LastErrorTime
	}
	return json.Marshal(peerStatusJSON{
		s.Service, s.Region, s.State, seconds(s.ContactAge), seconds(s.Freshness), seconds(s.ApplyLag), s.PendingRows, s.RowsApplied,
		s.Quarantined, s.Progress, seconds(s.Remaining), seconds(s.ClockOffset), s.Suspended, s.Throttled, s.LastError, failedAt,
	})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (s *PeerStatus) UnmarshalJSON(data []byte) error {
	var j peerStatusJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	*s = PeerStatus{
		j.Service, j.Region, j.State, duration(j.ContactAge), duration(j.Freshness), duration(j.ApplyLag), j.PendingRows, j.RowsApplied,
		j.Quarantined, j.Progress, duration(j.Remaining), duration(j.ClockOffset), j.Suspended, j.Throttled, j.LastError, time.Time{},
	}
	if j.LastErrorTime != nil {
		s.LastErrorTime = *j.LastErrorTime
	}
	return nil
}

func seconds(d *time.Duration) *float64 {
	if d == nil {
		return nil
	}
	s := d.Seconds()
	return &s
}

func duration(seconds *float64) *time.Duration {
	if seconds == nil {
		return nil
	}
	return new(time.Duration(*seconds * float64(time.Second)))
}
