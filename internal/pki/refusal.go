package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Refusals are what HandshakeRefusal returns besides "".
var Refusals = []string{
	"plain_text",        // no TLS was spoken
	"tls_version",       // older than 1.3, or nothing else in common
	"no_certificate",    // the caller presented none
	"unknown_authority", // self-signed, or of a CA that is not, or not any more, trusted
	"expired",
	"not_yet_valid",
	"bad_certificate",   // not for clients, or malformed
	"wrong_identity",    // not exactly one URI SAN that says who it is, or one of another trust domain
	"refused_by_caller", // the caller did not accept our certificate
	"interrupted",       // the caller went away, or was too slow
	"other",
}

// identityError is the refusal of a certificate whose chain is in order.
type identityError struct{ error }

func (e identityError) Unwrap() error { return e.error }

// HandshakeRefusal says, of a connection that a server has closed, why its TLS handshake was not completed; "" if it was, or if it is no TLS.
func HandshakeRefusal(closed net.Conn) string {
	c, ok := closed.(*tls.Conn)
	if !ok {
		return ""
	}
	state := c.ConnectionState()
	if state.HandshakeComplete {
		return ""
	}
	return refusal(state, c.Handshake()) // it keeps its error, and the connection is closed
}

func refusal(state tls.ConnectionState, err error) string {
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "plain_text"
	}
	if _, ok := errors.AsType[identityError](err); ok {
		return "wrong_identity"
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			return "unknown_authority"
		}
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			if invalid.Cert != nil && time.Now().Before(invalid.Cert.NotBefore) {
				return "not_yet_valid"
			}
			return "expired"
		}
		return "bad_certificate"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" { // an alert
		return "refused_by_caller"
	}
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, os.ErrDeadlineExceeded, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, gone) {
			return "interrupted"
		}
	}
	switch {
	case state.Version == 0:
		return "tls_version"
	case len(state.PeerCertificates) == 0:
		return "no_certificate"
	}
	return "other"
}
