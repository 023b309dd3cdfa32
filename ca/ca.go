// Package ca holds the rules of a trust domain's certificate authority: names,
// revisions, join tokens, workload selectors, the entries that follow from the
// catalogue, the phases of a signing authority and the profile of what it issues.
//
// It is pure: no socket, disk, goroutine, clock or randomness. Time, serial
// numbers and seeds arrive as arguments, and it never holds a signing key. All
// functions may be called from several goroutines at once.
package ca

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Bounds of a revision's two parts.
const (
	MaxEpoch = 1<<9 - 1  // 511
	MaxIndex = 1<<44 - 1 // at 10,000 entries a second, 55 years
)

// Revision is the version of a trust domain's agreed state, equal on every
// replica: epoch << 44 | log index. It fits into 53 bits, so that JSON readers
// that know only doubles keep it exact.
type Revision uint64

// NewRevision puts a revision together. The error says which part is too large.
func NewRevision(epoch uint32, index uint64) (Revision, error) {
	if epoch > MaxEpoch {
		return 0, fmt.Errorf("epoch %d is over %d", epoch, MaxEpoch)
	}
	if index > MaxIndex {
		return 0, fmt.Errorf("log index %d is over %d", index, uint64(MaxIndex))
	}
	return Revision(uint64(epoch)<<44 | index), nil
}

// ParseRevision reads the form that String writes.
func ParseRevision(s string) (Revision, error) {
	epochText, indexText, ok := strings.Cut(s, ".")
	epoch, errEpoch := strconv.ParseUint(epochText, 10, 32)
	index, errIndex := strconv.ParseUint(indexText, 10, 64)
	if !ok || errEpoch != nil || errIndex != nil {
		return 0, fmt.Errorf("revision %.40q is not of the form EPOCH.INDEX, as in 0.8812", s)
	}
	r, err := NewRevision(uint32(epoch), index)
	if err != nil {
		return 0, fmt.Errorf("revision %.40q: %w", s, err)
	}
	return r, nil
}

// Epoch counts the recoveries of the cluster.
func (r Revision) Epoch() uint32 { return uint32(r >> 44) }

// Index is the log index within the epoch.
func (r Revision) Index() uint64 { return uint64(r) & MaxIndex }

// String shows a revision as EPOCH.INDEX, for example 0.8812.
func (r Revision) String() string {
	return strconv.FormatUint(uint64(r.Epoch()), 10) + "." + strconv.FormatUint(r.Index(), 10)
}

// KeyID is the lower-case hex SHA-256 of a SubjectPublicKeyInfo in DER. It names
// nodes, agents' keys and authorities.
func KeyID(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// CheckKeyID tells whether s has the form of a key id.
func CheckKeyID(s string) error {
	if len(s) != 2*sha256.Size || strings.Trim(s, "0123456789abcdef") != "" {
		return fmt.Errorf("key id %.80q is not 64 lower-case hex digits", s)
	}
	return nil
}

// Defaults of a domain's lifetimes.
const (
	DefaultX509SVID    = 12 * time.Hour
	DefaultPhase       = 48 * time.Hour
	DefaultRefreshHint = 5 * time.Minute
	DefaultJWTSVID     = 5 * time.Minute
	DefaultWITSVID     = time.Hour
)

// The longest lives of tokens, whatever a domain or an entry asks for: a JWT-SVID is
// worth its life to whoever steals it (JWT-SVID 3.3), a WIT-SVID cannot be revoked
// where nobody syncs.
const (
	MaxJWTSVID = time.Hour
	MaxWITSVID = 24 * time.Hour
)

// MinSVIDLife is the shortest life an SVID may be given: renewal at half of it
// must still leave a round trip.
const MinSVIDLife = 2 * time.Second

// Lifetimes are a domain's lifetimes with the defaults filled in.
type Lifetimes struct {
	X509SVID    time.Duration // of a workload's SVID
	AgentSVID   time.Duration // of an agent's own
	Phase       time.Duration // P; an authority lives 3P
	RefreshHint time.Duration // of the own bundle
	JWTSVID     time.Duration
	WITSVID     time.Duration
}

// LifetimesOf fills in the defaults; l may be nil. Where the phase is shorter
// than the default SVID life, the SVIDs' default is the phase.
func LifetimesOf(l *statev1.Lifetimes) Lifetimes {
	seconds := func(n uint32, otherwise time.Duration) time.Duration {
		if n == 0 {
			return otherwise
		}
		return time.Duration(n) * time.Second
	}
	phase := seconds(l.GetPhaseSeconds(), DefaultPhase)
	svid := seconds(l.GetX509SvidSeconds(), min(DefaultX509SVID, phase))
	return Lifetimes{
		X509SVID:    svid,
		AgentSVID:   seconds(l.GetAgentSvidSeconds(), svid),
		Phase:       phase,
		RefreshHint: seconds(l.GetBundleRefreshHintSeconds(), DefaultRefreshHint),
		JWTSVID:     seconds(l.GetJwtSvidSeconds(), min(DefaultJWTSVID, phase)),
		WITSVID:     seconds(l.GetWitSvidSeconds(), min(DefaultWITSVID, phase)),
	}
}

// Check refuses lifetimes under which a valid SVID could outlive the time its
// authority stays in the bundle, or could not be renewed.
func (l Lifetimes) Check() error {
	var errs []error
	for _, life := range []struct {
		name string
		d    time.Duration
		most time.Duration
	}{
		{"X.509-SVID", l.X509SVID, l.Phase}, {"agent SVID", l.AgentSVID, l.Phase},
		{"JWT-SVID", l.JWTSVID, min(MaxJWTSVID, l.Phase)}, {"WIT-SVID", l.WITSVID, min(MaxWITSVID, l.Phase)},
	} {
		switch {
		case life.d >= MinSVIDLife && life.d <= life.most:
		case life.most == l.Phase:
			errs = append(errs, fmt.Errorf("%s life %v is not between %v and the phase %v", life.name, life.d, MinSVIDLife, l.Phase))
		default:
			errs = append(errs, fmt.Errorf("%s life %v is not between %v and %v", life.name, life.d, MinSVIDLife, life.most))
		}
	}
	if l.Phase > 365*24*time.Hour {
		errs = append(errs, fmt.Errorf("phase %v is over a year", l.Phase))
	}
	if l.RefreshHint < time.Second || l.RefreshHint > 24*time.Hour {
		errs = append(errs, fmt.Errorf("bundle refresh hint %v is not between 1s and 24h", l.RefreshHint))
	}
	return errors.Join(errs...)
}
