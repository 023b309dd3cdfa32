package exchange_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/entente-mesh/entente/federation/exchange"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// Whatever one address does with its connections to a bundle endpoint, a follower at
// another one is answered, and held back as it asks.
func TestStrangersKeepNoFollowerOut(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	at := serve(t, ca.Issue(endpointID.Path()), exchange.Handler("/bundle.json", publish(7, jwks(7, ca)).source))
	where, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	from := func(address string) *net.Dialer {
		return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: 2 * time.Second}
	}
	config := func(protocol string) *tls.Config {
		config := tlsconfig.TLSClientConfig(ca.Bundle(), tlsconfig.AuthorizeID(endpointID))
		config.NextProtos = []string{protocol}
		return config
	}
	follow := func(t *testing.T) {
		t.Helper()
		transport := &http.Transport{TLSClientConfig: config("http/1.1"), DialContext: from("127.0.0.9").DialContext}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: 3 * time.Second}
		got, err := client.Get(at)
		if err != nil {
			t.Fatalf("the follower: %v", err)
		}
		got.Body.Close()
		request, err := http.NewRequest("GET", at, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("If-None-Match", got.Header.Get("ETag"))
		request.Header.Set("Prefer", "wait=1")
		began := time.Now()
		if got, err = client.Do(request); err != nil {
			t.Fatalf("the follower: %v", err)
		}
		got.Body.Close()
		if got.Header.Get("Preference-Applied") != "wait" || got.StatusCode != http.StatusNotModified || time.Since(began) < time.Second {
			t.Errorf("the follower was not held back: %s after %v, %v", got.Status, time.Since(began), got.Header)
		}
	}
	follow(t) // control

	const stranger = "127.0.0.2"
	first := fmt.Sprintf("GET /bundle.json HTTP/1.1\r\nHost: %s\r\n", where.Host)
	speak := func(conn net.Conn, text string) {
		secure := tls.Client(conn, config("http/1.1"))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if secure.HandshakeContext(ctx) == nil {
			io.WriteString(secure, text)
		}
	}
	for _, attack := range []struct {
		name string
		many int
		do   func(net.Conn)
	}{
		{"silent connections", 1200, func(net.Conn) {}},
		{"half a handshake", 1200, func(c net.Conn) { c.Write([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}) }},
		{"half a header", 400, func(c net.Conn) { speak(c, first+"X-Slow: ") }},
		{"a body that never ends", 400, func(c net.Conn) { speak(c, first+"Content-Length: 1000\r\n\r\nx") }},
		{"long polls that are never read", 400, func(c net.Conn) { speak(c, first+"Prefer: wait=60\r\nIf-None-Match: *\r\n\r\n") }},
	} {
		t.Run(attack.name, func(t *testing.T) {
			for range attack.many {
				conn, err := from(stranger).Dial("tcp", where.Host)
				if err != nil {
					break // the kernel's queue is full: nobody accepts
				}
				defer conn.Close()
				attack.do(conn)
			}
			follow(t)
		})
	}
}
