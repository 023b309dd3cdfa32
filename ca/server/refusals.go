package server

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

const (
	// foldEvery is how often refusals of one kind are worth a line.
	foldEvery = time.Minute
	// maxFolded is how many kinds are told apart; beyond it nothing more is said until
	// some are a minute old.
	maxFolded = 4096
)

// refusals folds what callers can have said as often as they like.
type refusals struct {
	overflow bool // what is answered when there are too many kinds: said or not

	mu    sync.Mutex
	folds map[string]*fold
}

type fold struct {
	said time.Time
	more int // since
}

// say tells whether a refusal of that kind is said now, and how many were not since the
// last that was.
func (r *refusals) say(kind string, now time.Time) (unsaid int, say bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.folds[kind]
	switch {
	case f == nil:
		if len(r.folds) >= maxFolded {
			for name, other := range r.folds {
				if now.Sub(other.said) >= foldEvery {
					delete(r.folds, name)
				}
			}
			if len(r.folds) >= maxFolded {
				return 0, r.overflow
			}
		}
		if r.folds == nil {
			r.folds = make(map[string]*fold)
		}
		f = &fold{}
		r.folds[kind] = f
	case now.Sub(f.said) < foldEvery:
		f.more++
		return 0, false
	}
	unsaid, f.more, f.said = f.more, 0, now
	return unsaid, true
}

// admittedIn names an admission: of whom, and which one of his.
func admittedIn(resp any) string {
	switch r := resp.(type) {
	case *ententev1.AttestResponse:
		return fmt.Sprintf("agent %s of %d", r.GetAgent().GetName(), r.GetAgent().GetGeneration())
	case *ententev1.JoinResponse:
		return "CA node " + r.GetMember().GetId()
	}
	return ""
}

// known tells a caller with an identity, or a key that means something here, from one
// that anybody can be.
func (c caller) known() bool { return c.class != 0 && c.class != anonymous && c.class != stranger }

// refused counts what a stranger was refused, and says it once a minute. It tells whether
// the refusal belongs into the audit log: only if the stranger has proved that he holds a
// token or a certificate that is known here, and then once a minute for each.
func (s *Server) refused(method, remote string, err error) (record bool) {
	s.metrics.strangers.WithLabelValues(method).Inc()
	if unsaid, say := s.refusals.say(method, time.Now()); say {
		s.Log.Warn("strangers were refused", "method", method, "peer_address", remote, "reason", status.Convert(err).Message(), "more_since_last_line", unsaid)
	}
	var proved *provedError
	if !errors.As(err, &proved) {
		return false
	}
	_, record = s.refusals.say(method+" "+proved.shown, time.Now())
	return record
}
