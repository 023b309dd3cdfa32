package dataplane

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// maxReplay is how much of a request's body is kept for another attempt.
const maxReplay = 64 << 10

// source is a request body that several attempts may read, one after the other.
// It is read from the client only as an attempt asks for more, so a stream stays a
// stream; what was read is kept for the next attempt as long as it is small.
type source struct {
	mu       sync.Mutex
	wake     sync.Cond
	from     io.Reader
	kept     []byte
	lost     bool // more than maxReplay was read: no other attempt can start
	err      error
	pulling  bool
	attempt  *attemptBody // the one that may read
	trailers func() http.Header
}

func newSource(from io.Reader, trailers func() http.Header) *source {
	s := &source{from: from, trailers: trailers}
	s.wake.L = &s.mu
	return s
}

// replayable reports whether another attempt could still read it all.
func (s *source) replayable() bool {
	if s == nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.lost && (s.err == nil || s.err == io.EOF)
}

// failed is the client's error, if it was the client that failed to send the body.
func (s *source) failed() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == io.EOF {
		return nil
	}
	return s.err
}

// next makes the body of a new attempt and cuts off the one before. trailer is
// filled when the end is reached.
func (s *source) next(trailer http.Header) *attemptBody {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempt = &attemptBody{source: s, trailer: trailer}
	s.wake.Broadcast()
	return s.attempt
}

type attemptBody struct {
	source  *source
	offset  int
	trailer http.Header
	closed  bool
}

var errAttemptOver = errors.New("this attempt is over")

func (b *attemptBody) Read(p []byte) (int, error) {
	s := b.source
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.attempt != b || b.closed:
			return 0, errAttemptOver
		case b.offset < len(s.kept):
			n := copy(p, s.kept[b.offset:])
			b.offset += n
			return n, nil
		case s.err != nil:
			if s.err == io.EOF && b.trailer != nil {
				for name, values := range s.trailers() {
					b.trailer[name] = values
				}
			}
			return 0, s.err
		case s.pulling:
			s.wake.Wait()
		default:
			if n, done := s.pull(b, p); done {
				return n, nil
			}
		}
	}
}

// pull reads once from the client, without the lock, and keeps what came. done:
// n bytes were put into p directly.
func (s *source) pull(b *attemptBody, p []byte) (n int, done bool) {
	s.pulling = true
	lost := s.lost
	s.mu.Unlock()
	n, err := s.from.Read(p)
	s.mu.Lock()
	s.pulling = false
	s.err = err
	s.wake.Broadcast()
	if n == 0 {
		return 0, false
	}
	if lost {
		return n, true
	}
	if len(s.kept)+n > maxReplay {
		// b has read all that was kept, or it would not pull.
		s.kept, s.lost = nil, true
		b.offset = 0
		return n, s.attempt == b
	}
	if s.kept == nil {
		s.kept = make([]byte, 0, max(n, 512))
	}
	s.kept = append(s.kept, p[:n]...)
	if s.attempt != b {
		return 0, false // the next attempt finds it in kept
	}
	b.offset += n
	return n, true
}

// Close ends the attempt's reading. It never blocks.
func (b *attemptBody) Close() error {
	s := b.source
	s.mu.Lock()
	defer s.mu.Unlock()
	b.closed = true
	s.wake.Broadcast()
	return nil
}
