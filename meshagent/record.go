package meshagent

import (
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// record is an entry as a CA node told it. A key and what was signed for it are shown only
// to who satisfies the record that the signer agreed to: the CA node that told the agent of
// the entry may lie about its selectors, and another one, that signs, does not. Immutable.
type record struct {
	client.Record
	selectors []string
}

func recordOf(e *statev1.Entry) *record {
	return &record{client.RecordOf(e), e.GetSelectors()}
}

// is reports whether two records are the same; a nil one is not.
func (r *record) is(other *record) bool { return r != nil && other != nil && r.Record == other.Record }

// inherit takes over what is held for the same entry and SPIFFE ID. Until it is signed
// again for a new record, it is shown to who satisfies both: a record that restricts does
// so at once, one that permits does when a CA node has signed for it.
func (i *Identity) inherit(before *Identity) {
	if before.ID == i.ID {
		i.SVID, i.WIT = before.SVID, before.WIT
	}
	i.demand()
}

// demand settles which selectors a process must satisfy. Called on an identity under
// construction, when its record, SVID or WIT is another one.
func (i *Identity) demand() {
	i.Demands = i.record.selectors
	also := func(signedFor *record) {
		if signedFor.is(i.record) || len(i.Demands) == 0 {
			return
		}
		if signedFor == nil || len(signedFor.selectors) == 0 {
			i.Demands = nil // nobody was to have it
			return
		}
		for _, selector := range signedFor.selectors {
			if !slices.Contains(i.Demands, selector) {
				i.Demands = append(slices.Clip(i.Demands), selector)
			}
		}
	}
	if i.SVID != nil {
		also(i.SVID.signedFor)
	}
	if i.WIT != nil {
		also(i.WIT.signedFor)
	}
	i.selectors = nil
	if selectors, err := workloadattest.Parse(i.Demands); err == nil {
		i.selectors = selectors
	}
}

// Common are the selectors that the entry demands now and did when what is held was signed.
func (i *Identity) Common() []string {
	return slices.DeleteFunc(slices.Clone(i.record.selectors), func(selector string) bool {
		lacks := func(signedFor *record) bool {
			return signedFor == nil || !slices.Contains(signedFor.selectors, selector)
		}
		return i.SVID != nil && lacks(i.SVID.signedFor) || i.WIT != nil && lacks(i.WIT.signedFor)
	})
}
