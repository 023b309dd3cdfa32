package server

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// foldEvery is how often refusals of one kind are worth a line.
const foldEvery = time.Minute

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
	if unsaid, say := s.refusals.Say(method, time.Now()); say {
		s.Log.Warn("strangers were refused", "method", method, "peer_address", remote, "reason", status.Convert(err).Message(), "more_since_last_line", unsaid)
	}
	var proved *provedError
	if !errors.As(err, &proved) {
		return false
	}
	_, record = s.refusals.Say(method+" "+proved.shown, time.Now())
	return record
}
