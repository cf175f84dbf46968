// Package dbcontrollerv1 is the wire protocol of db-controller: Resources for users, Feed for other regions.
package dbcontrollerv1

// What both ends of the protocol must spell alike, besides the messages.
const (
	// ErrorDomain is the domain of every google.rpc.ErrorInfo of this protocol.
	ErrorDomain = "dbcontroller.io"
	// ReasonCursorLost in a FAILED_PRECONDITION of Feed.Tail: the cursor has no history any more, compare instead.
	ReasonCursorLost = "CURSOR_LOST"
	// ReasonWrongPeer in a FAILED_PRECONDITION of Feed: the server is not the Deployment that the Peer message expects.
	ReasonWrongPeer = "WRONG_PEER"
	// ReasonWrongRegion in a FAILED_PRECONDITION of a write: the regions disagree about the owner, or it cannot be reached by routing.
	ReasonWrongRegion = "WRONG_REGION"
	// ForwardedByHeader carries the region that forwarded a write. A forwarded write is never forwarded again.
	ForwardedByHeader = "Dbc-Forwarded-By"
	// MinVersionHeader of a Get, BatchGet or List carries an etag that the caller has seen: no cache then answers with anything older. REST also takes the
	// query parameter min_version.
	MinVersionHeader = "X-Min-Version"
)
