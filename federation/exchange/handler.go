// Package exchange is how bundles travel between trust domains: the endpoint that serves ours and the fetcher that follows
// another domain's, in both profiles of SPIFFE Federation, https_spiffe and https_web.
//
// The endpoint is plain SPIFFE: an anonymous GET. Beyond the specification it answers conditional requests, and holds one back
// that says "Prefer: wait=N" (RFC 7240) until the bundle changes, so that a follower of ours learns of a new authority in one
// round trip instead of at its next refresh.
//
// Both sides speak TLS 1.3 and 1.2, by the intermediate settings of Mozilla's guide that Federation 5 asks for. No other listener
// or client of the mesh speaks TLS 1.2.
package exchange

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Limits of the endpoint, which anybody may call.
const (
	// MaxWait is the longest that a request is held back.
	MaxWait = time.Minute

	// One address has a quarter of each.
	maxWaiting     = 256 // requests held back at a time; others are answered at once
	maxConnections = 1024
	maxStreams     = 16 // of one HTTP/2 connection
	// undisturbed is how long a connection is left in peace by others of its address.
	undisturbed = 5 * time.Second
	drainTime   = 3 * time.Second
)

// Source gives the bundle to serve, as written by bundle.Marshal, its sequence, and a channel that is closed when this is no
// longer the newest. It is called concurrently and must be quick. An empty jwks means that there is none yet.
type Source func() (jwks []byte, sequence uint64, changed <-chan struct{})

// Handler serves a bundle at exactly one path, by GET and HEAD.
func Handler(path string, source Source) http.Handler {
	waiting := admission.NewPlaces(admission.Share(maxWaiting, admission.Never))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		switch {
		case r.URL.Path != path:
			refuseBody(w)
			http.Error(w, "no bundle here; it is at "+path, http.StatusNotFound)
			return
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			refuseBody(w)
			http.Error(w, "a bundle can only be read", http.StatusMethodNotAllowed)
			return
		case r.ContentLength != 0:
			refuseBody(w)
			http.Error(w, "a request for a bundle has no body", http.StatusBadRequest)
			return
		}
		jwks, sequence, changed := source()
		tag := etag(jwks, sequence)
		if wait := preferredWait(r); wait > 0 && len(jwks) > 0 && !matches(r, tag) {
			// There is news already. Without this word a follower would take us for a server that
			// holds nothing back, and come again only at its next refresh.
			w.Header().Set("Preference-Applied", "wait")
		} else if wait > 0 && len(jwks) > 0 {
			// Without a place it is answered at once; when its place is taken, a little later.
			held, answer := context.WithCancel(r.Context())
			if place := waiting.Take(admission.SourceOf(r.RemoteAddr), time.Now(), answer); place != nil {
				w.Header().Set("Preference-Applied", "wait")
				jwks, tag = hold(held, source, tag, changed, wait)
				place.Leave()
			}
			answer()
		}
		if len(jwks) == 0 {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "this node has no bundle yet", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "no-cache") // may be kept, must be asked about
		if matches(r, tag) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(jwks)))
		if r.Method == http.MethodGet {
			w.Write(jwks)
		}
	})
}

// refuseBody keeps the server from waiting for the body of a request that is refused.
func refuseBody(w http.ResponseWriter) {
	http.NewResponseController(w).SetReadDeadline(time.Now())
}

// hold returns the bundle as soon as it has another tag, or as it is when the time is up.
func hold(ctx context.Context, source Source, old string, changed <-chan struct{}, wait time.Duration) (jwks []byte, tag string) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		more := true
		select {
		case <-changed:
		case <-timer.C:
			more = false
		case <-ctx.Done():
			more = false
		}
		var sequence uint64
		jwks, sequence, changed = source()
		if tag = etag(jwks, sequence); tag != old || !more {
			return jwks, tag
		}
	}
}

// etag is strong: the sequence tells bundles apart, and the hash tells apart what must not but could have one sequence.
func etag(jwks []byte, sequence uint64) string {
	return fmt.Sprintf(`"%d-%x"`, sequence, sha256.Sum256(jwks))
}

// matches evaluates If-None-Match (RFC 9110 13.1.2).
func matches(r *http.Request, tag string) bool {
	for _, line := range r.Header.Values("If-None-Match") {
		for candidate := range strings.SplitSeq(line, ",") {
			candidate = strings.TrimPrefix(strings.TrimSpace(candidate), "W/")
			if candidate == tag || candidate == "*" {
				return true
			}
		}
	}
	return false
}

// preferredWait reads "Prefer: wait=N" (RFC 7240 4.3), at most MaxWait.
func preferredWait(r *http.Request) time.Duration {
	for _, line := range r.Header.Values("Prefer") {
		for preference := range strings.SplitSeq(line, ",") {
			name, value, _ := strings.Cut(preference, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "wait") {
				continue
			}
			seconds, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 32)
			if err != nil {
				return 0
			}
			return min(time.Duration(seconds)*time.Second, MaxWait)
		}
	}
	return 0
}

// Serve serves the https_spiffe profile on a listener until ctx is done; then it answers the requests that are held back,
// closes the listener and returns nil. The certificate is the source's SVID at each handshake; clients are not asked for one.
func Serve(ctx context.Context, listener net.Listener, svid x509svid.Source, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 5 * time.Second, // a ReadTimeout would end the requests that are held back
		WriteTimeout:      MaxWait + 30*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          log.New(io.Discard, "", 0), // strangers' failed handshakes
	}
	config := peer.Intermediate(peer.NoClient(peer.FromSVID(svid), "h2", "http/1.1"))
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		grace, cancel := context.WithTimeout(context.Background(), drainTime)
		defer cancel()
		if server.Shutdown(grace) != nil {
			server.Close()
		}
	})
	err := server.Serve(tls.NewListener(admission.Listen(listener, admission.Share(maxConnections, undisturbed), nil), config))
	if stop() {
		return fmt.Errorf("bundle endpoint %s: %w", listener.Addr(), err)
	}
	<-drained
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("bundle endpoint %s: %w", listener.Addr(), err)
	}
	return nil
}
