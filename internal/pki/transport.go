package pki

import (
	"context"
	"net"
	"net/http"
	"time"
)

// Transport returns an HTTP/2 transport to one Deployment, over TLS that proves it to be want. Without a source it speaks HTTP/2 in plain
// text (development). A dead connection is noticed within 25 s, also below an idle stream. dial, unless nil, opens the connections.
func Transport(source Source, want Identity, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Transport {
	if dial == nil {
		dial = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	t := &http.Transport{
		DialContext:         dial,
		TLSHandshakeTimeout: 5 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		Protocols:           new(http.Protocols),
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
	}
	if source == nil {
		t.Protocols.SetUnencryptedHTTP2(true)
		return t
	}
	t.Protocols.SetHTTP2(true)
	t.TLSClientConfig = ClientTLS(source, want)
	return t
}

// Client returns an HTTP client over t that follows no redirect: one would lead to where nobody has declared a Deployment.
func Client(t http.RoundTripper) *http.Client {
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}
